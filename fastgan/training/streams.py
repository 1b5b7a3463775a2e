"""Random numbers as pure functions of (seed, use, number): nothing of them has to be saved."""

from __future__ import annotations

# What noise is drawn for: each use has its own stream.
NOISE, PENALTY, SAMPLES, INIT, DROPOUT, TEXTS, PERTURBATION, PLAYERS, EVALUATION = range(9)


def mixed_seed(seed: int, use: int, number: int) -> int:
    """63 bits that depend on all bits of the arguments (splitmix64's finaliser, once an argument)."""
    state = 0
    for value in (seed, use, number):
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


_MASK = (1 << 64) - 1

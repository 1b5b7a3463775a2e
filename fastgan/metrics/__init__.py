"""Measures of generated text: BLEU, chrF, ROUGE, distinct-n, self-BLEU, exact match and F1; accuracy of classes.

sacrebleu and rouge-score do the scoring where they have the measure (``pip install 'fastgan[metrics]'``), so that the
figures are those of their own commands. Each function takes lists of strings, and ``other``, the output of a second
system on the same inputs, for a paired bootstrap test. The command is ``fastgan evaluate``.
"""

from fastgan.metrics.answers import em_f1, exact_match, f1, normalize_answer
from fastgan.metrics.classes import classification
from fastgan.metrics.diversity import distinct, self_bleu
from fastgan.metrics.results import Comparison, Evaluation, Result
from fastgan.metrics.summaries import rouge
from fastgan.metrics.translation import bleu, chrf

__all__ = [
    "Comparison",
    "Evaluation",
    "Result",
    "bleu",
    "chrf",
    "classification",
    "distinct",
    "em_f1",
    "exact_match",
    "f1",
    "normalize_answer",
    "rouge",
    "self_bleu",
]

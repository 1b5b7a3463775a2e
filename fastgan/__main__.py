"""``python -m fastgan``: the command, where it is not on the path."""

from fastgan.cli import main

if __name__ == "__main__":
    main()

"""``python -m pipelines.cli``: the command line without the script ``retort``."""

from pipelines.cli import main

if __name__ == "__main__":
    main()

"""``python -m retemper`` is the command ``retemper``."""

from retemper.tools.cli.main import main

if __name__ == "__main__":
    main()

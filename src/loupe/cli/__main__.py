"""`python -m loupe.cli`."""

from loupe.cli import main

if __name__ == "__main__":
    main()

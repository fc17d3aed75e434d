"""`python -m klimb` is `klimb`."""

from klimb.cli import main

if __name__ == "__main__":
    main()

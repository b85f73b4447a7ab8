"""`python -m dejavu` is the `dejavu` command."""

from dejavu.cli.main import main

if __name__ == "__main__":
    main()

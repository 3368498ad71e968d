"""`python -m vitcli`, for torchrun and for machines where scripts are not on the path."""

from vitcli.cli import main

if __name__ == "__main__":
    main()

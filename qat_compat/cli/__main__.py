"""`python -m qat_compat.cli`, where the script is not on the path."""

from qat_compat.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

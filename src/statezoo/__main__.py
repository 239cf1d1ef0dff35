"""``python -m statezoo``."""

from statezoo.main import main

if __name__ == "__main__":
    main()

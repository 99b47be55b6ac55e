"""``accelerate launch -m fewbit.tuning FOLDER OUT …``: the command `fewbit tune`, in several processes."""

from fewbit.cli import main

if __name__ == "__main__":
    import sys

    sys.argv.insert(1, "tune")
    main()

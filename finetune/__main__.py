"""``python -m finetune``: the command, in the interpreter that a launcher names."""

from finetune.cli import main

main()

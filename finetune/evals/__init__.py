"""How a result is judged, one file each; the file's name is the word in ``evaluate.metrics``."""

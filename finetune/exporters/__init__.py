"""What a run is exported as, one file each; the file's name is the word after `--to`."""

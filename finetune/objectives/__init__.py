"""What a run minimises, one file each: how examples become a batch, and the batch's summed loss and count."""

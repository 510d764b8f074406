"""What fewer bytes on the wire cost: accuracy against bytes a batch."""

"""What this machine is and can hold: chip, memory, and the cost of arithmetic on known chips."""

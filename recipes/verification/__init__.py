"""What `warploom verify` is made of: its pool of ranks, its cases, what it says of a failure."""

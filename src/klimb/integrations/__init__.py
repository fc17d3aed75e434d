"""Other engines that run klimb: each is a thin file, and klimb does without it."""

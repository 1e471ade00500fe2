"""Drop-in scripts with the names and flags of MindFormers' documentation."""

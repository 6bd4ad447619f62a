"""What a launch and its folders are: ranks, run folders, provenance."""

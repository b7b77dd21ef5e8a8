"""One run of a script: the two directions, the report, and the folder that appears when it is complete."""

"""Runs, sweeps and single files on S3: objects, a folder that is followed there, and local copies of what is there."""

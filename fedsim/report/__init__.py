"""What is shown of runs: pictures, and tables over several runs."""

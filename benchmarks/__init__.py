"""Side-by-side measurements. Results are ratios from one run on one machine; nothing here is a test."""

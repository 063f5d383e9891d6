"""Engines run client work and return reduced updates; they know clients and entries, never methods."""

"""The field's standard small models."""

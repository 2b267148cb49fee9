"""The part of the report that each step of the numeric verdict fills."""

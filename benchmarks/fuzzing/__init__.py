"""The parts of the suite `fuzz`: good files, changes of them, and what reads them."""

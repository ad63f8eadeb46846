"""What we decide. Pure functions and small state machines; time and dice are arguments."""

"""The probability flow: its ODE, likelihood and bounds on grey levels."""

"""The probability-flow ODE: its solvers, its likelihood, and bounds for grey levels."""

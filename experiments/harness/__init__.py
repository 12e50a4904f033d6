"""What experiments share, in rooms; imports between them run one way (docs/architecture.md)."""

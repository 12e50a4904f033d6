"""The declaration of every setting: default, permitted values and one line of help."""

"""The highest load that keeps a promise, and the fleet that carries a demand at it."""

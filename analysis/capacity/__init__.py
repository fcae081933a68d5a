"""From runs at several loads to the highest load that keeps an SLO, and the fleet that carries a demand at it."""

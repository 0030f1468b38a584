"""The MiniMax-M3 text decoder."""

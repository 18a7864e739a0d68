"""Callbacks: what is timed, watched, drawn or written while a module trains; one file each."""

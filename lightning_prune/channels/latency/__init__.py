"""The time of a network as a function of its widths, from times that were measured on a device."""

"""The channel graph: finds coupled channels by following integer labels through the ops of real passes."""

"""Building blocks without pruning: parts, schemas of saved states, copies of models, files, progress bars."""

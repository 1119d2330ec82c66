"""What every report has in common: the look of its page, the look of its plots, numbers as a person reads them."""

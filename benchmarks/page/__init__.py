"""What a run leaves: tables, plots, the page of HTML and the recorded documents."""

"""`megastar compare`: plan and run the trainings of a comparison, evaluate them, and tabulate the results."""

"""`python -m data_pipelines.benchmark`: what one core does with images and text, step by step and next to others."""

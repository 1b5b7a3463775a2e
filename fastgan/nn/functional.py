"""The public functions, with torch's own names and signatures.

What a caller can get wrong is refused here, by shapes and dtypes alone so that ``torch.compile`` traces through.
"""

"""Reports about a cache or runs, each a single HTML file that works offline.

In: a finished cache, or folders of runs. Out: HTML with all images and charts embedded.
Inputs are never changed. Text from data sets (keys, class names) is escaped by the template engine.
Two things are custom code although libraries exist. The colors of feature maps (`colors.py`) need a PCA, which is a
few lines of torch, and scikit-learn is not a dependency. Tables are sorted by `templates/page.js`, because plain
HTML tables stay readable on phones and without scripts, unlike the data grids of libraries.
"""

"""Reports about a cache or about runs. Each report is a single HTML file that works offline.

In: a finished cache, or folders of runs. Out: HTML with all images and charts embedded.
Inputs are never changed. Text from datasets (keys, class names) is escaped by the template engine. Two parts are custom
code although libraries exist. The feature map colors (`colors.py`) need a PCA, which takes a few lines of torch;
scikit-learn is not a dependency. `templates/page.js` sorts plain HTML tables, because these stay readable on phones and
without scripts, unlike the data grids that libraries offer.
"""

"""Reports: a cache or runs as one HTML file that a browser opens offline.

In: a finished cache, or folders of runs. Out: HTML with all images and charts embedded.
Nothing that is read is changed. Text from data sets (keys, class names) is escaped by the template engine.
Hand-written although libraries exist: the colors of feature maps (`colors.py`), because a PCA fitted for one report
is a few lines of torch and scikit-learn is not a dependency; sorting of tables (`templates/page.js`), because plain
HTML tables stay readable on phones and without scripts, which the grids of libraries do not.
"""

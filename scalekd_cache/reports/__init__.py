"""Reports on a cache or on runs. Each report is a single HTML file that works offline.

In: a finished cache, or run folders. Out: HTML with all images and charts embedded.
Inputs are never changed. The template engine escapes text from datasets (keys, class names). Two parts are custom code
although libraries exist. The feature map colors (`colors.py`) need only a PCA, which takes a few lines of torch.
`templates/page.js` sorts plain HTML tables, which stay readable on phones and without scripts, unlike the data grids in
JavaScript libraries.
"""

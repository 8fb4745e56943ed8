"""Folders of public data sets as they are downloaded: who reads which layout, without edits by the user."""

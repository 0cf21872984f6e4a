"""Methods × bit widths × seeds on one model: what is asked, cells, their time, and how they are made."""

"""What people look at: pictures, and the pages that show them."""

from undistill.cli import app

app(prog_name="undistill")
